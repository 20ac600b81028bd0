-- What one run made of a batch, for this transaction alone. {type}: halfvec(n) or vector(n).

CREATE TEMPORARY TABLE landing_item (        -- items of which every text is embedded, quarantined or blank
    item_key text COLLATE "C" PRIMARY KEY, encoded_hash bytea NOT NULL, payload jsonb NOT NULL
) ON COMMIT DROP;
CREATE TEMPORARY TABLE landing_text (
    row_number bigint PRIMARY KEY, item_key text COLLATE "C" NOT NULL, vector_name text COLLATE "C" NOT NULL,
    chunk bigint NOT NULL, content_hash bytea NOT NULL, text text NOT NULL, blank boolean NOT NULL
) ON COMMIT DROP;
CREATE TEMPORARY TABLE landing_vector (      -- row_number: of the text
    row_number bigint PRIMARY KEY, content_hash bytea NOT NULL, encoded boolean NOT NULL, embedding {type} NOT NULL
) ON COMMIT DROP;
CREATE TEMPORARY TABLE landing_now (         -- the source, looked at again under the batch's lock
    item_key text COLLATE "C" PRIMARY KEY, current_hash bytea NOT NULL
) ON COMMIT DROP;
CREATE TEMPORARY TABLE landing_gone (id bigint PRIMARY KEY) ON COMMIT DROP;
