PREPARE cores=0b1
FETCH memory=index length=6
FETCH memory=parameter source=6 length=64
FETCH source=70 length=256 signal=0
FILL count=1 weight_bits=w8 signal=0 wait=0
MOVE pitch=2 plane=4 address=41 offchip_pitch=2 offchip_plane=4 words=2 rows=2 planes=2 signal=1
SAS cores=0b1 blocks=1 height=2 width=2 wide=a8
APW cores=0b1 shift=12 wide=a8 high=255 bank=1 blocks=1 height=2 width=2
CONV cores=0b1 codes=4 height=2 width=2 signal=0 wait=0,1
MOVE direction=out bank=1 pitch=2 plane=4 address=49 offchip_pitch=2 offchip_plane=4 words=2 rows=2 planes=2 wait=0
HALT
