"""Preference data in four stages. Each gives one type to the next, and knows only those before it.

stage     makes                                        by
sources   rows: (Place, object)                        rows.read_rows(a file, a folder or a name of the hub)
formats   PreferencePair: prompt and answers as text   read_pairs.read_pairs; one file a format
tokens    PairDataset of TokenizedPairs: ids, masks    dataset.load_datasets; kept in data.cache_dir
batches   GlobalBatch of PackedBatches                 loader.GlobalBatchLoader

pairs.py has a pair as token ids, and many of them as flat arrays; statistics.py what a person asks of a data set.
"""
