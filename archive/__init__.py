"""An archive read through: a source of any size, by Ray Data's actors, into Parquet that a stopped run goes on with."""
