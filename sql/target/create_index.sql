CREATE INDEX CONCURRENTLY {index} ON {target} USING {method} ({column} {operator_class}) {parameters}
