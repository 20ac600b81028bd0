-- The version of pgvector that this database has, and the one that its server could install; NULL where there is none.
SELECT (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS installed,
       (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS available;
