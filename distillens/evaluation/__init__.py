"""Training from scratch on distilled data, by a protocol that is a value."""
