"""What is shown to a user without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: the message names the key or file, the rule, the value and the remedy.

    The jobs print the message alone and exit with status 2. Anything else that is raised is our own
    mistake and keeps its traceback.
    """


class RunFailed(UserError):
    """A run could not go on (workers lost, a full disk); what it had saved stands."""


class Stopped(Exception):
    """The user asked for the stop; the run has saved where it is. The jobs exit with status 130."""
