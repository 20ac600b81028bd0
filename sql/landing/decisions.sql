SELECT item_key, decision, landed_hash, encoded_hash, payload IS DISTINCT FROM old_payload FROM landing_decision
