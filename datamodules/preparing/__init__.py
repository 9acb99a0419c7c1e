"""What `datamodules.prepare` does: files to records, records to rows, rows and pictures to shards."""
