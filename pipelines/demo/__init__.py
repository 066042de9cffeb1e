"""The demo: real pages from package registries, served on loopback under many host names and taken through the pipeline."""
