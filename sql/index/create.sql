-- One ANN index a vector name: in an index over several names, filtering would starve the rare ones.

CREATE INDEX CONCURRENTLY {index} ON {vector}
USING {method} (embedding {operator_class}) WITH ({parameters})
WHERE vector_name = {vector_name}
