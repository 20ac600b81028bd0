"""Where everything is kept: database, schema, SQL, locks, lake, models and destinations; and the source, only read.

Every room above calls it; it knows no other room but config and errors.
"""
