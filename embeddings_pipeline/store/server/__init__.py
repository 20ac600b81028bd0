"""The embedded PostgreSQL: started by the first process that needs it, stopped with the last.

Only `store.database` calls it.
"""
