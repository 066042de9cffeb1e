"""The demo: real pages from package registries, served on loopback under many host names, taken to the report."""
