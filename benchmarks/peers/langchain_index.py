"""LangChain's indexing API into pgvector: first load, nothing changed, 1 % changed."""

import time

from langchain_classic.indexes import SQLRecordManager
from langchain_core.documents import Document
from langchain_core.indexing import index
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_postgres import PGVector
from peer_common import MODEL, arguments, one_percent_changed, postgres, rows, timed

args = arguments()
server, url = postgres(args.state)
embeddings = HuggingFaceEmbeddings(model_name=MODEL, encode_kwargs={"normalize_embeddings": True})
store = PGVector(
    embeddings=embeddings, collection_name="peer", connection=url, pre_delete_collection=True, embedding_length=384
)
records = SQLRecordManager(f"peer{time.time()}", db_url=url)
records.create_schema()


def sync(pairs):
    documents = [Document(page_content=text, metadata={"source": key}, id=key) for key, text in pairs]
    return index(
        documents, records, store, cleanup="incremental", source_id_key="source", batch_size=1000, key_encoder="sha256"
    )


pairs = rows(args.catalogue, args.rows)
embeddings.embed_query("warm up")
with timed(f"langchain first load of {len(pairs)}"):
    print(sync(pairs))
with timed("langchain nothing changed"):
    print(sync(pairs))
with timed("langchain 1 % changed"):
    print(sync(one_percent_changed(pairs)))
