"""A model behind OpenAI's HTTP interface: `python -m moe.server FOLDER`, or `pipelines serve FOLDER`."""
