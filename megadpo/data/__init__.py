"""Preference data in four stages. Each stage gives one type to the next, and imports only the stages before it.

stage     makes                                        by
sources   rows: (Place, object)                        rows.read_rows(a file, a folder or a name of the hub)
formats   PreferencePair: prompt and answers as text   read_pairs.read_pairs; one file a format
tokens    PairDataset of TokenizedPairs: ids, masks    dataset.load_datasets; kept in data.cache_dir
batches   GlobalBatch of PackedBatches                 loader.GlobalBatchLoader

pairs.py: a pair as token ids, and many pairs as flat arrays. chosen.py: several data sets as one. statistics.py: lengths,
packing and single pairs, for people.
"""
