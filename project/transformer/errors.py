"""The one exception that stands for something the user can mend."""


class UserError(Exception):
    """Bad input. Its text is one clear sentence; the program prints it and exits with 1."""
