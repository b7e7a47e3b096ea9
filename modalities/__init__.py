"""The modalities that come with the framework; each is one folder."""
