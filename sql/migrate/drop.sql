DROP TABLE {vector}
