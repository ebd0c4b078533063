"""One run: what drives it, collects it, reports it and draws it."""
