"""The tasks that come with the framework; each is one file."""
