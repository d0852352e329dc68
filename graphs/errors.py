"""The one error that users see: a sentence with the value, the rule and what to do."""


class MeshwrightError(ValueError):
    """Bad input or an impossible request. The message is one sentence for the user."""


class InfeasibleError(MeshwrightError):
    """No plan fits; the message says the least memory found and what would fit."""
