"""Files of unknown origin, read as data. The file's own size bounds memory and time.

reading   opens a file, names it in errors, sets the bound; gzip and tar
arrays    npz and npy
pickled   pickles, of which only data is taken
tensors   torch.save
safe      safetensors
stored    JSON, named arrays

One package with one class of errors for sa_plugin, third_party and adapters. It knows none of them.
"""
