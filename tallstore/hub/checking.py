"""Verifying a bundle on the Hub, whose files stay there: what the Hub says of each, against the manifest."""
