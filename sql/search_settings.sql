-- For this transaction: how thoroughly to look. Parameters: table, exact_below (bytes), ef_search.

SELECT
    set_config('hnsw.ef_search', %(ef_search)s, true),
    set_config('ivfflat.probes', '20', true),
    set_config('enable_indexscan',
               CASE WHEN pg_table_size(%(table)s::regclass) < %(exact_below)s THEN 'off' ELSE 'on' END, true)
