"""Files of unknown origin, read as data. The file's own size bounds memory and time.

reading   opens a file, names it in errors, sets the bound; gzip and tar
arrays    npz and npy
pickled   pickles, of which only data is taken
tensors   torch.save

sa_plugin and third_party must not import each other, but both read files of unknown origin. The
folder `third_party/common/files` is therefore a symbolic link to this one, and this one must import
nothing from either.
"""
