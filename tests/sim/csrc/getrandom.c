// The standard library keys its hashers from getrandom, and tokio draws the order of select's branches from such a hasher. Here
// there is no chance but the seed's: every call gives the same bytes. Linked into the simulation's program alone.
#include <stddef.h>
#include <string.h>
#include <sys/types.h>

ssize_t getrandom(void *buffer, size_t length, unsigned int flags) {
    (void)flags;
    memset(buffer, 0x5a, length);
    return (ssize_t)length;
}
