"""Loading: experts by name, rebuilt from the bytes that they need and no others."""
