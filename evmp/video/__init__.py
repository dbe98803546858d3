"""Videos: which of their frames a job wants, and what is made of the results.

    footage       a video's bytes as a file, wherever they are
    spool         those of videos that come in cells
    container     opens a file that may be anything, and reads its packets
    ending        whether the bytes of a file tell that it was cut
    index         when each frame is shown, known from the packets alone
    sampling      which frames are wanted
    segment       a video cut into pieces that are decoded one by one, and what each is to give
    frames        the frames of a piece
    picture       a frame as RGB, as it is displayed
    part          what travels beside the result of a frame or clip
    gathering     the results of a video's frames, kept on disk until it is whole
    summary       what is said of all frames together

PyAV is imported in the stages that decode, when the first video is opened.
"""
