"""`pull`: tasks of a bundle on the Hub, into the Hub's cache or into a directory of their own."""
