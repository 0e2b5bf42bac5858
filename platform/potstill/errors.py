"""The one exception that is shown to a user without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: the message names the key or file, the rule, the value and the remedy.

    The jobs print the message alone and exit with status 2. Anything else that is raised is our own
    mistake and keeps its traceback.
    """
