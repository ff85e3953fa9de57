class ExportError(Exception):
    """A mistake in what the user gave. Its text is one line that says what is wrong and what to do."""
