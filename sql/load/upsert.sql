-- Rows that are as they were are not written, and keep their `updated_at`.

WITH written AS (
    INSERT INTO {table} AS loaded ({names})
    SELECT {loaded} FROM load_row
    ON CONFLICT ({key}) DO UPDATE SET ({names}) = ROW ({values})
    WHERE ROW ({old}) IS DISTINCT FROM ROW ({new})
    RETURNING xmax = 0 AS inserted
)
SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM written
