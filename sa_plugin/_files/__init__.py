"""Files of unknown origin: read as data, in memory and time that the file's own size bounds.

reading   a file, open, and errors that name it; the bound; gzip and tar
arrays    npz and npy
pickled   pickles, of which only data is taken
tensors   torch.save

sa_plugin and third_party must not import each other, and both read such files: the folder
`third_party/common/files` is a symbolic link to this one. It must import nothing of either.
"""
