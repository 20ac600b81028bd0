from embeddings_pipeline.cli.main import main

main()
