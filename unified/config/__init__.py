"""Configurations: the schema, how files are read, and the classes that names stand for."""
