"""The errors that a user is meant to read: one or two sentences, with the remedy."""


class TesselError(Exception):
    """Something went wrong that the user can mend; printed without a traceback, exit status 1."""

    exit_code = 1


class UsageError(TesselError):
    """What was asked for cannot be: a flag, a value or a combination of them; exit status 2."""

    exit_code = 2
