"""What a node can do, as use cases: transactions, side effects and their undo. No Celery."""
