"""Images with labels or boxes: opening, checking, reading."""
