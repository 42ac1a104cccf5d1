"""One cascade from everything that a user and the platform say to one frozen result.

`resolve.resolve()` makes a `settings.Settings`; `options` lists what the command line takes. This file imports
nothing, so that the command line can read the options without loading the rest.
"""
