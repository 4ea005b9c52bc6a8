"""The report of a bundle: what `inspect` and `statistics` tell, as one page for a browser, and its plots as files."""
