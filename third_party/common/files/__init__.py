"""Files of unknown origin: read as data, in memory and time that the file's own size bounds.

reading   a file, open, and errors that name it; the bound; gzip and tar
arrays    npz and npy
pickled   pickles, of which only data is taken
tensors   torch.save

sa_plugin and third_party must not import each other, so this folder is in both, byte for byte:
`sa_plugin/_files` is edited and `third_party/common/files` is its copy (a test compares them).
"""
