SELECT item_key, decision, landed_hash, encoded_hash FROM landing_decision
