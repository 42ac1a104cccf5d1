"""What a malformed runtime parameter raises. The names are the ones that hooks may catch."""


class RuntimeParameterException(Exception):
    """Base of the errors about a parameter that exists and can't be read."""


class InvalidJsonException(RuntimeParameterException):
    """The envelope is not JSON."""


class InvalidRuntimeParam(RuntimeParameterException):
    """The envelope is JSON of another shape, or its payload is not of its type."""
