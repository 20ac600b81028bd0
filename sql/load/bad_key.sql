-- A key that is NULL, or that several rows of the file have.

SELECT {key} FROM load_row GROUP BY {key} HAVING count(*) > 1 OR num_nulls({key}) > 0 LIMIT 1
