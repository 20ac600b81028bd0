-- A batch's rows are few beside the table: each is found by its key. The planner knows neither how many there are.

SET LOCAL enable_seqscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off
