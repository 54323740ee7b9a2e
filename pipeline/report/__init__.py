"""The report of a run: its schema, how it is put together from the stages, and JSON, Markdown and HTML of it."""
