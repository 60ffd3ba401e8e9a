"""A store on an object store: the same objects, byte for byte, as the files of a local one."""
