"""The Celery tasks of a node: validate, call an operation, return a payload."""
