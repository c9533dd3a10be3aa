"""Live migration of guests between nodes: one job over both workers, with one owner of the guest at any time.

rows.py          what SQL knows of a migration; who owns the guest
checks.py        whether it can be done at all, and what the target has to know (source)
accept.py        a QEMU on the target that waits for the guest, and giving it back (target)
transfer.py      memory is on its way, up to the moment at which QEMU says that it is complete (source)
finalize.py      the guest runs on (target), or goes back where it was
migrate.py       the job: which of these comes next, whatever died in between
recovery_table.py  the same as a table, for the documentation and the tests
"""
