"""The database: what a node remembers. Tables, their types, and how a transaction is opened."""

from models.base import Base, utc_now
from models.instance import DiskLease, Instance, Runtime, runtime_of
from models.job import InstanceLock, Job, JobParent
from models.live_migration import LiveMigration, MigrationSample
from models.node import Incarnation, Node
from models.session import Database, DatabaseUnusable
from models.snapshot import Snapshot
from models.uid_pool import UidLease, UidRange

__all__ = [
    "Base",
    "Database",
    "DatabaseUnusable",
    "DiskLease",
    "Incarnation",
    "Instance",
    "InstanceLock",
    "Job",
    "JobParent",
    "LiveMigration",
    "MigrationSample",
    "Node",
    "Runtime",
    "Snapshot",
    "UidLease",
    "UidRange",
    "runtime_of",
    "utc_now",
]
