"""A node: its Celery worker, what it does to guests, and the drivers it does it with."""
