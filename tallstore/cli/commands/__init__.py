"""The commands, a module each: options in, one call of the library, its result to a view.

A command imports what it needs where it needs it: `inspect` has answered before torch would be there.
"""
